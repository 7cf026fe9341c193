"""State tracking: what recurrence is for. Tasks, exact training made fast, live scores, and the study's grid."""
