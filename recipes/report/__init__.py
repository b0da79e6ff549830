"""``apportion-report``: what runs found, as one page, beside what the papers report."""
