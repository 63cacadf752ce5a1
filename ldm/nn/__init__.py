"""The networks: U-Net, autoencoder, text encoders, and attention."""
