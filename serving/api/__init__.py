"""HTTP: routes that parse, call and format. No HTTP type goes below this folder."""
