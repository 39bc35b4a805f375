"""The HTML report: what SWS does at each site and step."""
