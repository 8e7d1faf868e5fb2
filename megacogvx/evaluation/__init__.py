"""How good is it: measures of videos."""
