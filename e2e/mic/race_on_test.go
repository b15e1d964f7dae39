//go:build race

package mic

const storiesByDefault = 300
