"""How the embedded model is made: pack drawn pictures, train the reader, export. Not part of the installed package."""
