"""What several tests share: references, toys, tokenizers, adapters, policies. Test files import from here and not from
each other."""
