"""A detector behind HTTP: requests (`reading`) within limits (`limits`) become batches (`batching`) for a model
(`service`), and answers (`answers`); `app` has the routes, `page/` what a browser shows at `/`."""
