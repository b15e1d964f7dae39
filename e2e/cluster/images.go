package cluster

import (
	"archive/tar"
	"bytes"
	"cmp"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// epoch is the timestamp of an image, its layer and all files in the layer.
var epoch = time.Unix(0, 0).UTC()

// Image is a container image in a file of the format that `docker save` writes. Pods use it by Ref with imagePullPolicy
// Never, once it is imported into their node.
type Image struct {
	Name    string // without the tag: local/nmi
	Tag     string // derived from the content, except for PauseImage and TestImage
	Archive string
}

// Ref is the image name for a pod spec.
func (i Image) Ref() string { return i.Name + ":" + i.Tag }

// imageSpec describes an image: a root file system, if any, and a static program.
type imageSpec struct {
	name    string
	tag     string // "" to derive it from the content
	program string // path of the program's file
	target  string // path of the program in the image
	rootfs  string // folder with the root file system; "" for none
	args    []string
}

// pack writes the image into an archive in the cache unless the cache has an archive with the same content.
func (s imageSpec) pack(cache string) (Image, error) {
	dir := filepath.Join(cache, "images")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return Image{}, err
	}
	image, err := s.packInto(dir)
	if err != nil {
		return Image{}, fmt.Errorf("packing image %s: %w", s.name, err)
	}
	return image, nil
}

func (s imageSpec) packInto(dir string) (Image, error) {
	layer, err := os.CreateTemp(dir, "layer-")
	if err != nil {
		return Image{}, err
	}
	defer os.Remove(layer.Name())
	if err := errors.Join(s.writeLayer(layer), layer.Close()); err != nil {
		return Image{}, err
	}
	content, err := s.image(layer.Name())
	if err != nil {
		return Image{}, err
	}
	id, err := content.ConfigName()
	if err != nil {
		return Image{}, err
	}
	image := Image{Name: s.name, Tag: cmp.Or(s.tag, id.Hex[:12])}
	image.Archive = filepath.Join(dir, filepath.Base(s.name)+"-"+image.Tag+"-"+id.Hex[:12]+".tar")
	if _, err := os.Stat(image.Archive); err == nil {
		return image, nil
	}
	if err := writeArchive(image, content); err != nil {
		return Image{}, err
	}
	return image, removeOldArchives(dir, filepath.Base(s.name))
}

// image returns the image with the layer in the given file. Nothing in the image depends on the time, so that equal
// content makes an equal image.
func (s imageSpec) image(layerFile string) (v1.Image, error) {
	// The archive never leaves this computer: compressing it would only cost time.
	layer, err := tarball.LayerFromFile(layerFile, tarball.WithCompressionLevel(gzip.NoCompression))
	if err != nil {
		return nil, err
	}
	base, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{
		Architecture: runtime.GOARCH,
		OS:           "linux",
		Created:      v1.Time{Time: epoch},
		Config: v1.Config{
			Entrypoint: append([]string{s.target}, s.args...),
			Env:        []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
		},
	})
	if err != nil {
		return nil, err
	}
	return mutate.Append(base, mutate.Addendum{Layer: layer, History: v1.History{Created: v1.Time{Time: epoch}, CreatedBy: "e2e/cluster"}})
}

// writeArchive writes the archive in one step: another program never sees half of it.
func writeArchive(image Image, content v1.Image) error {
	tag, err := name.NewTag(image.Ref())
	if err != nil {
		return err
	}
	file, err := os.CreateTemp(filepath.Dir(image.Archive), "archive-")
	if err != nil {
		return err
	}
	defer os.Remove(file.Name())
	if err := errors.Join(tarball.Write(tag, content, file), file.Close()); err != nil {
		return err
	}
	return os.Rename(file.Name(), image.Archive)
}

// removeOldArchives removes all archives of an image name except the newest four: each change of the product adds an
// archive.
func removeOldArchives(dir, name string) error {
	const keep = 4
	archives, err := filepath.Glob(filepath.Join(dir, name+"-*.tar"))
	if err != nil {
		return err
	}
	age := func(path string) int64 {
		info, err := os.Stat(path)
		if err != nil {
			return 0
		}
		return -info.ModTime().UnixNano()
	}
	slices.SortFunc(archives, func(a, b string) int { return cmp.Compare(age(a), age(b)) })
	for i, archive := range archives {
		if i >= keep {
			if err := os.Remove(archive); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s imageSpec) writeLayer(w io.Writer) error {
	out := tar.NewWriter(w)
	if s.rootfs == "" {
		for _, d := range []struct {
			name string
			mode int64
		}{{"etc/", 0o755}, {"tmp/", 0o1777}} {
			if err := out.WriteHeader(&tar.Header{Name: d.name, Mode: d.mode, Typeflag: tar.TypeDir, ModTime: epoch}); err != nil {
				return err
			}
		}
		passwd := []byte("root:x:0:0:root:/:/none\nnobody:x:65534:65534:nobody:/:/none\n")
		if err := addFile(out, "etc/passwd", 0o644, int64(len(passwd)), bytes.NewReader(passwd)); err != nil {
			return err
		}
	} else if err := addTree(out, s.rootfs); err != nil {
		return err
	}
	program, err := os.Open(s.program)
	if err != nil {
		return err
	}
	defer program.Close()
	info, err := program.Stat()
	if err != nil {
		return err
	}
	if err := addFile(out, s.target[1:], 0o755, info.Size(), program); err != nil {
		return err
	}
	return out.Close()
}

// addTree adds a folder's contents, owned by root. It does not keep the times of the files, so that equal content makes
// an equal image.
func addTree(out *tar.Writer, root string) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		link := ""
		if info.Mode().Type() == fs.ModeSymlink {
			if link, err = os.Readlink(path); err != nil {
				return err
			}
		}
		header, err := tar.FileInfoHeader(info, link)
		if err != nil {
			return err
		}
		if header.Name, err = filepath.Rel(root, path); err != nil {
			return err
		}
		if d.IsDir() {
			header.Name += "/"
		}
		header.Uid, header.Gid, header.Uname, header.Gname = 0, 0, "", ""
		header.ModTime, header.AccessTime, header.ChangeTime = epoch, time.Time{}, time.Time{}
		header.Format = tar.FormatUnknown
		if err := out.WriteHeader(header); err != nil || !info.Mode().IsRegular() {
			return err
		}
		file, err := os.Open(path)
		if err != nil {
			return err
		}
		defer file.Close()
		_, err = io.Copy(out, file)
		return err
	})
}

func addFile(out *tar.Writer, name string, mode, size int64, content io.Reader) error {
	if err := out.WriteHeader(&tar.Header{Name: name, Mode: mode, Size: size, Typeflag: tar.TypeReg, ModTime: epoch}); err != nil {
		return err
	}
	_, err := io.Copy(out, content)
	return err
}
