"""A model with spatial tokens in a serving engine: vLLM, by a plugin that it finds by itself; see docs/serving.md."""

from spatial_tokens.serving.export import hf_overrides, serve_export

__all__ = ["hf_overrides", "serve_export"]
