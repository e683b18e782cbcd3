"""The report: one HTML page that shows how good a detector is and where it goes wrong."""
