"""Images to scene features; one file an encoder."""
