// Package architecture checks the structure of the code: which package may import which, and how large a file, a
// function and a type may become. It protects against code that cannot be read from the top down, such as a package
// that imports its parent, or a type to which everything is attached.
package architecture
