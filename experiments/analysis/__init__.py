"""Statistics of finished runs, and the tables, pages and pictures made from them."""
