"""What SWS changes in the pictures of a pipeline: metrics of pairs, with intervals, as JSON and a page."""
