"""Imported first, to hide a warning of other libraries about missing ipywidgets."""

import warnings

warnings.filterwarnings("ignore", message="IProgress not found")
