"""Networks that several notebooks share, each built on a class of transformers or diffusers."""
