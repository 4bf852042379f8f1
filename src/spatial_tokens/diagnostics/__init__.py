"""Diagnostics: will spatial tokens help with an encoder (`probe`), and does a trained model use them (`usage`)?"""

from spatial_tokens.diagnostics.exchange import another_pictures
from spatial_tokens.diagnostics.place_probe import probe
from spatial_tokens.diagnostics.plots import plot_probe, plot_usage
from spatial_tokens.diagnostics.report import ProbeReport
from spatial_tokens.diagnostics.token_usage import usage
from spatial_tokens.diagnostics.training_log import log_usage
from spatial_tokens.diagnostics.usage_report import UsageReport

__all__ = ["ProbeReport", "UsageReport", "another_pictures", "log_usage", "plot_probe", "plot_usage", "probe", "usage"]
