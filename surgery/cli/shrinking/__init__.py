"""`surgery shrink`: its options, its estimate, its texts, its steps as data, and what runs them."""
