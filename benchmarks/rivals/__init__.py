"""hfslim beside other ways to make a trained classifier smaller, at equal multiply-accumulates."""
