"""Small settings in the originals' yaml schemas, and how a test overrides them.

`null` marks what follows from other settings unless overridden.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import OmegaConf

Settings = dict[str, Any]

CONVNET = """
double_z: false
z_channels: 16
resolution: 16
in_channels: 3
out_ch: 3
ch: 32  # GroupNorm has 32 groups
ch_mult: [1, 1, 2]
num_res_blocks: 1
attn_resolutions: [4]
"""

MINDALLE = """
dataset: {tokenizer_type: CharBPE, context_length: 6, image_resolution: null}
stage1: {type: vqgan, embed_dim: 16, n_embed: 24}
stage2:
  type: transformer1d
  vocab_size_txt: 40
  vocab_size_img: null
  use_cls_cond: null
  hparams:
    embed_dim: 16
    n_layers: 2
    n_heads: 2
    n_dense_layers: null
    ctx_len_img: null
    ctx_len_txt: null
    embd_pdrop: 0.0
    resid_pdrop: 0.0
    attn_pdrop: 0.0
    mlp_bias: true
    attn_bias: true
    gelu_use_approx: false
    n_classes: 10
"""

RQ = """
stage1:
  dataset: {type: synthetic}
  arch:
    type: rq-vae
    code_hier: 1
    hparams:
      bottleneck_type: rq
      embed_dim: 16
      n_embed: 24
      latent_shape: null
      code_shape: null
      shared_codebook: true
      decay: 0.99
      restart_unused_codes: true
      use_padding_idx: false
      masked_dropout: 0.0
      loss_type: mse
      latent_loss_weight: 0.25
    checkpointing: true
stage2:
  dataset: {vocab_size: null}
  arch:
    type: rq-transformer
    ema: null
    vocab_size: null
    block_size: null
    embed_dim: 16
    input_embed_dim: null
    use_padding_emb: false
    input_emb_vqvae: true
    head_emb_vqvae: true
    scaled_head_emb_vqvae: false
    cumsum_depth_ctx: true
    shared_tok_emb: true
    shared_cls_emb: true
    embd_pdrop: 0.0
    body:
      n_layer: 2
      block: {n_head: 2, mlp_bias: true, attn_bias: true, attn_pdrop: 0.0, resid_pdrop: 0.1, gelu: v1}
    head:
      n_layer: 1
      block: {n_head: 4, mlp_bias: true, attn_bias: true, attn_pdrop: 0.0, resid_pdrop: 0.1, gelu: v1}
  sampling: {top_k: null, top_p: 0.95, temp: 1.0}
"""

RQ_COND = {
    "text": """
dataset: {dataset: cc3m, txt_tok_name: bpe16k_huggingface, vocab_size_txt: null, image_resolution: null,
          context_length: null}
arch: {vocab_size_cond: 40, block_size_cond: 6}
""",
    "class": "{dataset: {type: imagenet}, arch: {vocab_size_cond: 10, block_size_cond: 1}}",
    "none": "{dataset: {type: ffhq}, arch: {vocab_size_cond: 1, block_size_cond: 1}}",
}

TAMING = """
model:
  base_learning_rate: 4.5e-06
  target: taming.models.vqgan.VQModel
  params:
    embed_dim: 12
    n_embed: 24
    lossconfig:
      target: taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator
      params: {disc_start: 0, disc_weight: 0.75, disc_num_layers: 2}
"""


def mindalle_settings(overrides: Settings) -> Settings:
    config = _parse(MINDALLE)
    config["stage1"]["hparams"] = {**_parse(CONVNET), "pdrop": 0.0}
    _override(config, overrides)
    stage1, stage2 = config["stage1"], config["stage2"]
    _fill(config["dataset"], image_resolution=stage1["hparams"]["resolution"])
    _fill(stage2, vocab_size_img=stage1["n_embed"])
    _fill(
        stage2["hparams"],
        n_dense_layers=stage2["hparams"]["n_layers"],
        ctx_len_img=_grid(stage1["hparams"]) ** 2,
        ctx_len_txt=config["dataset"]["context_length"],
    )
    return config


def rq_settings(cond: str, overrides: Settings) -> Settings:
    config = _parse(RQ)
    config["stage1"]["arch"]["ddconfig"] = {**_parse(CONVNET), "dropout": 0.0}
    for section, values in _parse(RQ_COND[cond]).items():
        config["stage2"][section] |= values
    _override(config, overrides)

    hparams, ddconfig = config["stage1"]["arch"]["hparams"], config["stage1"]["arch"]["ddconfig"]
    grid = _grid(ddconfig)
    _fill(hparams, latent_shape=[grid, grid, hparams["embed_dim"]], code_shape=[grid, grid, 3])
    (lh, lw, width), (h, w, _) = hparams["latent_shape"], hparams["code_shape"]

    arch, dataset = config["stage2"]["arch"], config["stage2"]["dataset"]
    code_width = lh // h * (lw // w) * width
    _fill(arch, vocab_size=hparams["n_embed"], block_size=hparams["code_shape"], input_embed_dim=code_width)
    _fill(dataset, vocab_size=arch["vocab_size"])
    _fill(config["stage2"]["sampling"], top_k=arch["vocab_size"])
    if cond == "text":
        _fill(dataset, vocab_size_txt=arch["vocab_size_cond"], context_length=arch["block_size_cond"])
        _fill(dataset, image_resolution=ddconfig["resolution"])
    return config


def taming_settings(overrides: Settings) -> Settings:
    config = _parse(TAMING)
    config["model"]["params"]["ddconfig"] = {**_parse(CONVNET), "dropout": 0.0}
    _override(config, overrides)
    return config


def omit_settings(config: Settings, names: Sequence[str]) -> None:
    """Take the named settings away, as a yaml that relies on the originals' defaults would."""
    for name in names:
        parent, key = _find(config, name)
        del parent[key]


def _override(config: Settings, overrides: Settings) -> None:
    for name, value in overrides.items():
        parent, key = _find(config, name)
        parent[key] = value


def _find(config: Settings, name: str) -> tuple[Settings, str]:
    """The mapping and the key of the one setting whose path ends with `name`."""
    tail = tuple(name.split("__"))
    found = [(parent, path) for parent, path in _walk(config, ()) if path[-len(tail) :] == tail]
    if len(found) != 1:
        known = ["__".join(path) for _, path in found or _walk(config, ())]
        raise KeyError(f"{name!r} names {len(found)} settings; choose from {known}")
    parent, path = found[0]
    return parent, path[-1]


def _walk(config: Settings, path: tuple[str, ...]) -> Iterator[tuple[Settings, tuple[str, ...]]]:
    for key, value in config.items():
        yield config, (*path, key)
        if isinstance(value, dict):
            yield from _walk(value, (*path, key))


def _fill(settings: Settings, **values: Any) -> None:
    for name, value in values.items():
        if settings[name] is None:
            settings[name] = value


def _grid(ddconfig: Settings) -> int:
    return int(ddconfig["resolution"]) // 2 ** (len(ddconfig["ch_mult"]) - 1)


def _parse(text: str) -> Settings:
    settings = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}
