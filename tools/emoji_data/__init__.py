"""The emoji data set, made from npm packages: packages, drawings, captions, colours, splits, shards."""
