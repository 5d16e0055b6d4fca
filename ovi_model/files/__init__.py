"""Weight files: reading, identifying, quantising, fetching. No model family is named here."""
