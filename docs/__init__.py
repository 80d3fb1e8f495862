"""The scripts that draw and measure what the documents say."""
