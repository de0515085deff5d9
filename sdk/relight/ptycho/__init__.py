"""Ptychography: what a scan measured (`data`), and scans that are made up (`simulation`)."""
