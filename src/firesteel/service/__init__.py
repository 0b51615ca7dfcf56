"""The HTTP service behind `firesteel serve`: who may call, what is kept between its starts, and its routes."""
