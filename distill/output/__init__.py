"""What a run leaves: its work folder, the student with its history, the card."""
