//! Where an image is found and what it says of itself.
