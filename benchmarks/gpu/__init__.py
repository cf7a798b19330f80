"""What a card of a given size can hold."""
