"""Measure jtile's ops against their rivals: `python -m bench run`, then `python -m bench report`."""
