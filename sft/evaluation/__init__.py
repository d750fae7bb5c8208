"""Before and after: what is measured, and the report."""
