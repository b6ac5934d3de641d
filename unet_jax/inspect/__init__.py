"""Looking inside: pictures of data and predictions, the network drawn."""
