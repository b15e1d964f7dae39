package cluster

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"

	"golang.org/x/sync/errgroup"
)

// Names of images. Every cluster has PauseImage and TestImage. Their tags are fixed, so that manifests can name them.
const (
	// PauseImage is the image of pod sandboxes.
	PauseImage = "local/pause:1"
	// TestImage contains the program podclient. Without arguments podclient only waits for a signal. With the argument
	// token it requests a token at once.
	TestImage = "local/e2e:1"

	nmiImage    = "local/nmi"
	micImage    = "local/mic"
	clientImage = "local/goclient"
)

// BuildBaseImages builds the images that every cluster has.
func BuildBaseImages(ctx context.Context) ([]Image, error) {
	e2e, err := e2eDir()
	if err != nil {
		return nil, err
	}
	cache, err := cacheDir()
	if err != nil {
		return nil, err
	}
	program, err := buildProgram(ctx, e2e, "./podclient", "podclient")
	if err != nil {
		return nil, err
	}
	var images []Image
	for _, name := range []string{"local/pause", "local/e2e"} {
		image, err := imageSpec{name: name, tag: "1", program: program, target: "/podclient"}.pack(cache)
		if err != nil {
			return nil, err
		}
		images = append(images, image)
	}
	return images, nil
}

// BuildClient builds the program clients/goclient and an image with this program.
func BuildClient(ctx context.Context) (program string, image Image, err error) {
	e2e, err := e2eDir()
	if err != nil {
		return "", Image{}, err
	}
	cache, err := cacheDir()
	if err != nil {
		return "", Image{}, err
	}
	if program, err = buildProgram(ctx, e2e, "./clients/goclient", "goclient"); err != nil {
		return "", Image{}, err
	}
	image, err = imageSpec{name: clientImage, program: program, target: "/goclient"}.pack(cache)
	return program, image, err
}

// BuildNMIImage builds the image of NMI from the same parts as the product's Dockerfile: the static program, and the
// root file system with iptables that deploy/image/rootfs.sh assembles. The program is at /nmi instead of /usr/bin/nmi.
// The tag identifies the content.
func BuildNMIImage(ctx context.Context, progress func(string)) (Image, error) {
	if progress == nil {
		progress = func(string) {}
	}
	repo, err := RepoDir()
	if err != nil {
		return Image{}, err
	}
	cache, err := cacheDir()
	if err != nil {
		return Image{}, err
	}
	rootfs, err := ensureRootfs(ctx, progress, repo, cache)
	if err != nil {
		return Image{}, err
	}
	program, err := buildProgram(ctx, repo, "./cmd/nmi", "nmi")
	if err != nil {
		return Image{}, err
	}
	return imageSpec{name: nmiImage, program: program, target: "/nmi", rootfs: rootfs}.pack(cache)
}

// BuildMICImage builds the image of MIC: the static program, at the same path as in the product's Dockerfile. It leaves
// out the public CA certificates that the Dockerfile adds, because no test needs them.
func BuildMICImage(ctx context.Context) (Image, error) {
	repo, err := RepoDir()
	if err != nil {
		return Image{}, err
	}
	cache, err := cacheDir()
	if err != nil {
		return Image{}, err
	}
	program, err := buildProgram(ctx, repo, "./cmd/mic", "mic")
	if err != nil {
		return Image{}, err
	}
	return imageSpec{name: micImage, program: program, target: "/usr/bin/mic"}.pack(cache)
}

// BuildProductImages builds the images that the chart needs: that of NMI and, for standard mode, that of MIC. A later
// InstallChart or InstallStandard finds the images in the cache and takes less time.
func BuildProductImages(ctx context.Context, progress func(string), standard bool) error {
	if _, err := BuildNMIImage(ctx, progress); err != nil || !standard {
		return err
	}
	_, err := BuildMICImage(ctx)
	return err
}

// ensureRootfs returns the folder with the root file system of the NMI image. It runs deploy/image/rootfs.sh once for
// each content of the script, Debian release and architecture.
func ensureRootfs(ctx context.Context, progress func(string), repo, cache string) (string, error) {
	script := filepath.Join(repo, "deploy", "image", "rootfs.sh")
	text, err := os.ReadFile(script)
	if err != nil {
		return "", fmt.Errorf("building the NMI image: %w", err)
	}
	release, err := osRelease()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "nmi-rootfs-"+keyOf(string(text), release, runtime.GOARCH))
	return dir, buildOnce(dir, func(dest string) error {
		progress("assembling the NMI image's root file system (deploy/image/rootfs.sh)")
		cmd := exec.CommandContext(ctx, "bash", script, dest)
		cmd.Dir = repo
		_, err := run(cmd)
		return err
	})
}

// ImportImages loads images into all nodes. It skips an image if the node has one with the same name and tag, so the
// tag must be derived from the content.
func (c *Cluster) ImportImages(ctx context.Context, images ...Image) error {
	var group errgroup.Group
	for _, n := range nodeSpecs {
		group.Go(func() error {
			var archives []string
			for _, image := range images {
				have, err := runCtr(ctx, c.bin, n.Name, "images", "list", "--quiet", "name==docker.io/"+image.Ref())
				if err != nil {
					return err
				}
				if have == "" {
					archives = append(archives, image.Archive)
				}
			}
			return importImages(ctx, c.bin, n.Name, archives)
		})
	}
	return group.Wait()
}
