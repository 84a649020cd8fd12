"""Arrays and records in, figures and tables out."""
