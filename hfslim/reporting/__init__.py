"""Reports of a compression: tables, figures, one web page."""
