package main

// Kademlia's messages, as far as providers go (libp2p's specs, kad-dht): a protobuf after its length.

import (
	"bufio"
	"errors"
	"io"

	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/multiformats/go-varint"
	"google.golang.org/protobuf/encoding/protowire"
)

const (
	kademlia = "/ipfs/kad/1.0.0"

	typeAddProvider, typeGetProviders                    = 2, 3
	fieldType, fieldKey, fieldProviders protowire.Number = 1, 2, 9
	fieldID, fieldAddress               protowire.Number = 1, 2
)

func message(kind uint64, key []byte) []byte {
	data := protowire.AppendTag(nil, fieldType, protowire.VarintType)
	data = protowire.AppendVarint(data, kind)
	data = protowire.AppendTag(data, fieldKey, protowire.BytesType)
	return protowire.AppendBytes(data, key)
}

func getProviders(key []byte) []byte { return message(typeGetProviders, key) }

func addProvider(key []byte, who peer.AddrInfo) []byte {
	inner := protowire.AppendTag(nil, fieldID, protowire.BytesType)
	inner = protowire.AppendBytes(inner, []byte(who.ID))
	for _, address := range who.Addrs {
		inner = protowire.AppendTag(inner, fieldAddress, protowire.BytesType)
		inner = protowire.AppendBytes(inner, address.Bytes())
	}
	data := protowire.AppendTag(message(typeAddProvider, key), fieldProviders, protowire.BytesType)
	return protowire.AppendBytes(data, inner)
}

func tell(stream io.Writer, data []byte) error {
	_, err := stream.Write(append(varint.ToUvarint(uint64(len(data))), data...))
	return err
}

// hear reads the providers of an answer.
func hear(stream io.Reader) ([]peer.AddrInfo, error) {
	reader := bufio.NewReader(stream)
	size, err := varint.ReadUvarint(reader)
	if err != nil {
		return nil, err
	}
	if size > 1<<20 {
		return nil, errors.New("an answer of more than a MiB")
	}
	data := make([]byte, size)
	if _, err := io.ReadFull(reader, data); err != nil {
		return nil, err
	}
	var found []peer.AddrInfo
	err = fields(data, func(number protowire.Number, value []byte) error {
		if number != fieldProviders {
			return nil
		}
		var who peer.AddrInfo
		found = append(found, who)
		return fields(value, func(number protowire.Number, value []byte) (err error) {
			last := &found[len(found)-1]
			switch number {
			case fieldID:
				last.ID, err = peer.IDFromBytes(value)
			case fieldAddress:
				var address ma.Multiaddr
				address, err = ma.NewMultiaddrBytes(value)
				last.Addrs = append(last.Addrs, address)
			}
			return err
		})
	})
	return found, err
}

// fields calls `each` for every field that is bytes.
func fields(data []byte, each func(protowire.Number, []byte) error) error {
	for len(data) > 0 {
		number, kind, size := protowire.ConsumeTag(data)
		if size < 0 {
			return protowire.ParseError(size)
		}
		data = data[size:]
		if kind != protowire.BytesType {
			size = protowire.ConsumeFieldValue(number, kind, data)
			if size < 0 {
				return protowire.ParseError(size)
			}
			data = data[size:]
			continue
		}
		value, size := protowire.ConsumeBytes(data)
		if size < 0 {
			return protowire.ParseError(size)
		}
		data = data[size:]
		if err := each(number, value); err != nil {
			return err
		}
	}
	return nil
}
