"""All that speaks Label Studio."""
