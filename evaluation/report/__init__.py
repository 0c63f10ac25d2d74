"""One page that shows what an evaluation found: read, judged, and written as HTML or Markdown."""
