"""What models still answer: answers, measures, attacks."""
