"""Several runs side by side: runs become cells, cells tables, plots and a page."""
