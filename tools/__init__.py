"""Programs around the scripts; no reader of a paper needs to open them."""
