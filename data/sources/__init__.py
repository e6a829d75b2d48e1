"""What a config's `data=` can be; each is a frozen config, and what it loads is a corpus."""
