"""What SWS changes in the images of a pipeline: metrics of pairs, with intervals, as JSON and a page."""
