"""Query sets, steering prefixes, prompt rendering and the demo world: what goes in."""
