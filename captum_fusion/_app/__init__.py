"""The application: models, images and files around the library."""
