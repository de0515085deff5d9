"""The API, its store, dispatcher and reaper. No torch, numpy or scipy here: it starts in about a second."""
