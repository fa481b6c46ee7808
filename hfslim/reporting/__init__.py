"""What compression did to a model: reports, tables, figures, one web page."""
