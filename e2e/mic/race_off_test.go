//go:build !race

package mic

const defaultSequences = 4_000
