"""Random tiny models of every architecture that timm and transformers know."""
