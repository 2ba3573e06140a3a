"""Generated from proto/whet/v1 by scripts/gen_proto.py; not to be edited."""
