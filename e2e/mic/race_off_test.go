//go:build !race

package mic

const storiesByDefault = 10_000
