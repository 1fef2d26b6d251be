"""Generated from protos/skim/v1 by `make protos`."""
